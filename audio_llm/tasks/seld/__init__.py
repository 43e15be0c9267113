"""Sound event localisation and detection in stereo."""
