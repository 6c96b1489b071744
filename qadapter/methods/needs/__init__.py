"""What a method can need besides the pairs: one file per kind of stage, declared by the methods that need it."""
