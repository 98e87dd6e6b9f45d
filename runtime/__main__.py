"""`python -m kvrun`"""

import sys

from kvrun.commands.main import main

sys.exit(main())
