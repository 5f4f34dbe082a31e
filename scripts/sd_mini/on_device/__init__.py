"""SD-mini trained from data that lie on the device: draws are composed, encoded and fed there, batch by batch."""
