"""The commands: each module has `add_arguments(parser)`, `run(args)` and `main(argv)`."""
