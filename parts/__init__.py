"""What the commands are made of; README says what each file does. Nothing here is typed or copied alone."""
