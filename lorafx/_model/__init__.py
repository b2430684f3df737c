"""The live model: regions, branches, adapted weights, and how an adapter is put into it."""
