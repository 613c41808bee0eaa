"""An index over tars that somebody else wrote."""
