"""The console command ``swinv2-scale``."""

import sys

from swinv2_scale.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
