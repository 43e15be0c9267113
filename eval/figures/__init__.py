"""What evaluation says in numbers: each reply is scored once, and every table, page and comparison takes its
estimates from here."""
