"""`python -m fettle` is `fettle`."""

import sys

from fettle.cli import main

sys.exit(main())
