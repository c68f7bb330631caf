"""fastlm inside of other libraries, each imported only where it is used."""
