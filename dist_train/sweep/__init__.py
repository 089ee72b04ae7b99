"""Many runs from one file: each variant, seed and fold, one table and one plot."""
