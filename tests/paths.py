"""Where tests find what they read: the repository, their own data, and the folder `shared` beside the checkout.

A test marked ``@pytest.mark.shared("fixtures/bat_ref.npz")`` reads that file of ``SHARED`` and is skipped without it.
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "tests" / "data"
SHARED = ROOT.parent / "shared"
