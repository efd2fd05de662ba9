"""`python -m serve.predict`: what `ffl-predict` runs."""

from serve.predict.command import entry

if __name__ == "__main__":
    entry()
