"""The layers of images and movies, with a trained model."""
