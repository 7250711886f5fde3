"""Files of weights: reading, recognising and writing them; the pretrained ones by name; the Hub."""
