"""The command line: `merge`, `show`, `convert` and `diff`; torch is imported when one runs."""
