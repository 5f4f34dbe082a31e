"""`python -m ldm.schema docs/configuration.md` writes that page."""

import sys

from ldm.checkpoints import save_text
from ldm.schema.documentation import page

save_text(sys.argv[1] if sys.argv[1:] else "docs/configuration.md", page())
