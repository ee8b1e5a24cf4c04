"""What a trained model is taught: each task prepares its data and hands it to the trainer."""
