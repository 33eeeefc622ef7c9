"""No test asks the network for anything: what isn't in the repository or an installed package isn't there."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
