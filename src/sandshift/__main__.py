"""`python -m sandshift`."""

from sandshift.cli.main import main

if __name__ == "__main__":
    main()
