"""`ffl-web`: bundles as a folder of static files that classify in the visitor's own browser."""
