"""What the commands of ``fgbg`` do."""
