"""One self-contained HTML file about one or several runs: numbers with intervals, curves, directions, and sounds to
hear beside what the model said about them. Nothing in it is fetched from anywhere, and the same predictions give the
same bytes."""
