"""The two published models as plain torch modules."""
