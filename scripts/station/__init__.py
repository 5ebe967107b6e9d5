"""What two or more of the scripts share."""
