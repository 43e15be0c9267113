"""EchoTwin-QA: two towers and a head that scores options, or letters."""
