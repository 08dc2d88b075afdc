"""Every model behind one door, `load_model(reference)`, shown in notebooks 01 and 03."""
