"""``python -m audio_llm VERB``: the same as ``audio-llm VERB``, for launchers that want a module."""

import sys

from audio_llm.cli import main

if __name__ == "__main__":
    sys.exit(main())
