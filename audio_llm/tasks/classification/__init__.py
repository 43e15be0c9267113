"""Which sound a clip is: classification and tagging."""
