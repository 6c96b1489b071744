"""What long work reports while it runs, and the results that it keeps so that a killed run goes on."""
