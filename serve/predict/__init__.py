"""`ffl-predict`: any number of images become one row each, in shards that a killed run keeps."""
