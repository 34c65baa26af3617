"""From images and texts to the arrays that the models read."""
