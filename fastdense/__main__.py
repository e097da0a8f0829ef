"""``python -m fastdense``."""

import sys

from .cli import main

sys.exit(main())
