"""Tables of experiments: from a file that says what is compared to trained runs, and to means with their intervals.

`tables` reads the file, `plan` makes runs of it, `run_state` says how far they are. `pool` trains what is missing here,
`slurm` hands it to a cluster. `judge` evaluates what is trained, `statistics` and `summary` make rows of it, `content`
says them, `curves` and `across` draw them, and `output` writes it all.
"""
