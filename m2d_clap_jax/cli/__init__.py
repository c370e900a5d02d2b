"""The subcommands of `m2d-clap`, one module each: `add_arguments(parser)` and `run(args)`.

What takes long to import is imported by `run`, so that --help answers at once.
"""
