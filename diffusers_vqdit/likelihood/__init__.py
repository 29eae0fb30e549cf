"""What a model of likelihoods tells besides drawing: bounds, and galleries to search."""
