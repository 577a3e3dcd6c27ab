"""The paper's claims at toy scale: small models, trained alike but for one thing, and what they draw."""
