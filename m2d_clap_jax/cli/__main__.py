"""python -m m2d_clap_jax.cli, the same as m2d-clap."""
import sys

from m2d_clap_jax.cli.main import main

sys.exit(main())
