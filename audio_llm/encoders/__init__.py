"""One file per network: module, configuration, key table of its published checkpoints, registration."""
