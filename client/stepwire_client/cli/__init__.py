"""The command line `stepwire`: one module a command."""
