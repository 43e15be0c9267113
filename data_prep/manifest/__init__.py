"""Anybody's rows about sound files become samples: ``kind: manifest`` of ``audio-llm prep``.

A format (:mod:`data_prep.manifest.formats`, one file each) reads rows as they lie; all that follows is one path: the
words are checked (``checks``), sides are chosen (``sides``), sounds are decoded, cut and packed (``packing``).
"""
