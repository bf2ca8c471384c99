"""One module per verb of the command line, each with `main(argv)`; imported only when its verb is called."""
