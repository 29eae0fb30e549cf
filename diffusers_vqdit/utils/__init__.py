"""What several rooms of the package use, and that needs none of them."""
