"""``python -m tallcodec`` is the command ``tallcodec``."""

import sys

from .cli import main

sys.exit(main())
