"""Corpora made of recordings: stages that give each item more to tell, and a ledger each, by which a run goes on.

``stage`` is the contract, ``recipe`` names a source, stages and an engine, ``run`` takes all items through them.
"""
