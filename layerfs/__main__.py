"""`python -m layerfs`: the same as the command `layerfs`."""

import sys

from layerfs.cli.main import main

sys.exit(main())
