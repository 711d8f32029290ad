"""What a problem is: pure data, evaluation, the verifier, formats. No solver lives here."""
