"""Every run of the suite uses the same examples, so that a failure can be reproduced."""

import tempfile
from pathlib import Path

from hypothesis import configuration, settings

# @given reads the settings when it is applied, so the profile is loaded before the test modules.
settings.register_profile("suite", derandomize=True, database=None, deadline=None, max_examples=60)
settings.load_profile("suite")
# hypothesis stores its Unicode tables in a folder, by default in the project.
configuration.set_hypothesis_home_dir(Path(tempfile.gettempdir()) / "hypothesis")
