"""Systems that stepwire is measured against, each run by an interpreter of its own.

A worker imports the standard library, its system and `protocol`; stepwire need not be installed.
"""
