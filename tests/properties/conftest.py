"""Every run of the suite tries the same examples, so running a test again reproduces its failure."""

import tempfile
from pathlib import Path

from hypothesis import configuration, settings

# The decorator @given reads the settings when it is applied, so the profile is loaded before any test module is.
settings.register_profile("suite", derandomize=True, database=None, deadline=None, max_examples=60)
settings.load_profile("suite")
# hypothesis stores its Unicode tables in a folder, by default in the project.
configuration.set_hypothesis_home_dir(Path(tempfile.gettempdir()) / "hypothesis")
