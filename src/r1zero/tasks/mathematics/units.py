"""Units that may stand after a number: one table, from how they are written to what they are.

A unit is checked only where gold and answer both name one, so a word belongs here when leaving it out changes nothing
about the number. Words that multiply (million, dozen, percent, half) must never be here.
"""

_UNITS = {
    # length
    "m": "m meter meters metre metres",
    "cm": "cm centimeter centimeters centimetre centimetres",
    "mm": "mm millimeter millimeters millimetre millimetres",
    "km": "km kilometer kilometers kilometre kilometres",
    "in": "in inch inches",
    "ft": "ft foot feet",
    "yd": "yd yard yards",
    "mi": "mi mile miles",
    # time
    "s": "s sec secs second seconds",
    "min": "min mins minute minutes",
    "h": "h hr hrs hour hours",
    "day": "day days",
    "week": "week weeks",
    "month": "month months",
    "year": "yr yrs year years",
    # mass
    "g": "g gram grams",
    "kg": "kg kilogram kilograms",
    "mg": "mg milligram milligrams",
    "lb": "lb lbs pound pounds",
    "oz": "oz ounce ounces",
    "ton": "ton tons tonne tonnes",
    # volume
    "L": "l liter liters litre litres",
    "ml": "ml milliliter milliliters",
    "gal": "gal gallon gallons",
    "cup": "cup cups",
    # money
    "$": "dollar dollars usd",
    "¢": "cent cents",
    "€": "euro euros",
    # angle
    "°": "degree degrees deg",
    "rad": "rad radian radians",
    # physics
    "N": "n newton newtons",
    "J": "j joule joules",
    "W": "w watt watts",
    "Pa": "pa pascal pascals",
    "Hz": "hz hertz",
    "K": "k kelvin kelvins",
    "V": "v volt volts",
    "A": "a ampere amperes amp amps",
    "C": "c coulomb coulombs",
    "mol": "mol moles mole",
    "eV": "ev",
    "keV": "kev",
    "MeV": "mev",
    "GeV": "gev",
    "erg": "erg ergs",
    "nm": "nm",
    "pc": "pc parsec parsecs",
    "AU": "au",
    "mph": "mph",
    "km/h": "kmh kph kmph",
    # what is counted: no unit at all
    "": (
        "unit units people person persons student students child children boy boys girl girls man men woman women"
        " friend friends player players team teams member members worker workers guest guests"
        " apple apples orange oranges egg eggs cookie cookies cake cakes pie pies slice slices"
        " book books page pages pencil pencils pen pens marble marbles ball balls card cards coin coins stamp stamps"
        " toy toys box boxes bag bags car cars bus buses ticket tickets sheet sheets"
        " tree trees flower flowers cow cows sheep chicken chickens duck ducks dog dogs cat cats animal animals"
        " piece pieces item items point points step steps game games round rounds lap laps trip trips"
        " way ways solution solutions integer integers number numbers value values digit digits root roots"
        " side sides edge edges vertex vertices face faces triangle triangles square squares"
    ),
}
UNITS = {word: unit for unit, words in _UNITS.items() for word in words.split()}
# Single letters are units only inside a text command: 5\text{ m} is a length, 5m a product.
ADJECTIVES = {"square": "^2", "sq": "^2", "cubic": "^3", "cu": "^3"}
CURRENCIES = {r"\$": "$", "$": "$", "€": "€", "£": "£", "¢": "¢"}
