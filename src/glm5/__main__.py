"""`python -m glm5`: the command line, also where its script is not on the path."""

from glm5.cli.app import main

if __name__ == "__main__":
    main()
