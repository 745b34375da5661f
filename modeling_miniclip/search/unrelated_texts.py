"""Captions that have nothing to do with the images of most indexes, to compare the results of a search with.

Eight captions for each of 32 subjects: an index of one subject is related to few of them.
"""

from ..utils.checksums import value_checksum

TEXTS = """
a blacksmith hammers a glowing horseshoe on an anvil
a potter shapes a tall vase on a spinning wheel
wood shavings curl up from a carpenter's plane
a cobbler stitches the sole of a brown leather boot
a glassblower turns a bubble of molten glass on a pipe
hands knitting a striped scarf with wooden needles
an old sewing machine beside spools of coloured thread
a watchmaker looks through a loupe at tiny gears

a nurse takes the blood pressure of an elderly patient
a dentist bends over a patient under a bright lamp
an empty hospital bed next to a heart monitor
a child with a plaster cast on one arm
white pills spill out of a small orange bottle
surgeons in green gowns stand around an operating table
an ambulance with its back doors open in front of a clinic
an x-ray image of a broken wrist

steam rises from a bowl of noodle soup with an egg
a baker slides loaves of bread into a stone oven
sliced lemons and mint leaves in a glass jug
a birthday cake with lit candles on a lace tablecloth
pancakes with blueberries and syrup on a blue plate
a cook tosses vegetables in a flaming wok
jars of homemade jam in a row on a pantry shelf
a half eaten cheese sandwich next to a cup of coffee

a farmer drives a red tractor across a ploughed field
sheep crowd together at the gate of a muddy pen
hens peck at grain in front of a wooden coop
a milking machine is attached to a spotted cow
bales of hay lie scattered over a mown meadow
a scarecrow with a straw hat stands among the corn
workers pick grapes between the rows of a vineyard
a pig rolls in the mud beside a fence

a container ship is unloaded by tall cranes
fishing nets dry on the wall of a small harbour
a lighthouse stands on a rocky point at dusk
a rowing boat with peeling paint lies upside down on the shore
a ferry full of cars leaves the pier
sailors climb the rigging of a tall ship
a rusty anchor half buried in the sand
a crab trap is pulled over the side of a boat

a steam locomotive crosses a stone viaduct
commuters wait behind the yellow line of a platform
a railway worker checks the bolts of a switch
an empty compartment with green seats and a folding table
a freight train winds through a snowy pass
the barrier of a level crossing is lowered in the rain
passengers sleep in the seats of a night train
the departure board of a railway station shows delays

a pilot checks the instruments before take-off
suitcases go round on a baggage carousel
a biplane flies upside down over an airfield
a helicopter lowers a rope to a mountain rescue team
the wing of an airliner above a layer of clouds at sunrise
a hot air balloon is filled with air on a meadow
mechanics open the engine of a jet in a hangar
a paper plane lies on a windowsill

the rings of a planet against a black sky
an astronaut floats outside a space station
a telescope dome opens under the stars
a rocket lifts off in a cloud of smoke
the full moon behind the branches of a bare tree
the tail of a comet above a dark horizon
a boulder and wheel tracks on a reddish desert planet
a satellite dish points at the evening sky

cells divide under a microscope
a chemist pours a blue liquid into a test tube
crystals of salt seen through a magnifying glass
a lightning bolt jumps between two metal spheres
a white mouse in a laboratory cage
rows of seedlings with labels in a growth chamber
a skeleton of a dinosaur in a museum hall
a gloved hand holds a glass slide with a red stain

a spreadsheet with columns of numbers on a screen
a printed invoice with a company logo at the top
a page of handwritten notes with underlined words
a login form with two empty fields and a button
a crossword puzzle that is almost solved
an error message in a white box on a blue background
a passport lies open next to a boarding pass
a receipt from a supermarket with a coffee stain

a street map with a route drawn in red
a bar chart compares the sales of four years
the wiring diagram of a radio on yellowed paper
a weather map with two storms over the ocean
the floor plan of a flat with three rooms
a pie chart with one large green slice
a family tree with names in small boxes
an arrow points from one box of a flow chart to the next

a pianist plays on the stage of an empty concert hall
a street musician with an accordion and an open case
a brass band marches past a town hall
a teenager tunes an electric guitar in a garage
a conductor raises the baton in front of an orchestra
a drum kit stands on a carpet under red light
a choir in black robes sings by candlelight
vinyl records in wooden boxes at a flea market

ballet dancers stretch at a bar in front of a mirror
an actor in a crown kneels on a dimly lit stage
a clown with a red nose juggles three oranges
a puppet hangs from its strings behind a curtain
a trapeze artist swings below the roof of a circus tent
flamenco dancers in ruffled dresses stamp their feet
rows of empty velvet seats in a theatre
a magician pulls a scarf out of a top hat

a bride and a groom cut a cake with three tiers
guests throw rice in front of a church door
a priest baptises a crying baby
lanterns float on a river during a festival
mourners with umbrellas stand around a grave
graduates throw their caps into the air
a couple signs papers at a registry office
a procession carries a statue through narrow streets

two fencers in white lunge at each other
a curler sweeps the ice in front of a stone
a weightlifter holds a barbell above his head
a gymnast does a handstand on the rings
archers aim at targets across a lawn
rowers pull together in a boat with eight seats
a referee shows a yellow card to a player
billiard balls roll apart on a green table

a snow plough clears a mountain road at night
icicles hang from the gutter of a wooden house
an ice fisherman sits on a bucket next to a hole
a snowman with a carrot nose and a bowler hat
reindeer pull a sledge across a frozen lake
frost patterns on the window of a cabin
skiers sit in a chairlift above the fir trees
a car is buried under fresh snow up to its mirrors

a climber hangs from an overhanging rock face
a hut with a red roof below a glacier
prayer flags flutter on a high pass
a marmot looks out from between the boulders
hikers cross a rope bridge over a gorge
fog fills the valley below a summit cross
a cable car hangs over a steep forest
a shepherd leads goats along a stony trail

a camel caravan walks along the crest of a dune
a cactus with white flowers at the side of a dusty road
cracked mud in the bed of a dried up lake
an oil pump nods in the middle of a desert
a lizard rests in the shade of a stone
tents of nomads beside a well
a ruined adobe tower under a cloudless sky
a jeep is stuck in the sand up to its axles

a diver swims beside a sea turtle
clownfish hide among the arms of an anemone
a wreck covered in coral lies on the sea floor
jellyfish drift in dark blue water
a shark circles below the surface
an octopus squeezes into a shell
a school of silver fish turns in the light
seaweed sways in a tide pool with starfish

a bee covered in pollen sits on a thistle
ants carry pieces of leaves along a twig
a spider waits in the middle of a web with dew
a dragonfly rests on a reed
a caterpillar hangs from the edge of a leaf
moths circle around a porch lamp
a ladybird climbs up a blade of grass
a beekeeper in a veil lifts a frame out of a hive

an owl turns its head on a mossy branch
a heron stands on one leg in shallow water
a woodpecker looks out of a hole in a trunk
a parrot with green feathers cracks a nut
penguins slide on their bellies over the ice
storks build a nest on a chimney
a peacock spreads its tail on a gravel path
swallows sit in a row on a telephone wire

an elephant sprays itself at a waterhole
a fox with a bushy tail crosses a road at dawn
a bear catches a salmon at a waterfall
a hedgehog drinks from a saucer
giraffes bend down to drink with spread legs
a bat hangs upside down from the roof of a cave
a squirrel buries an acorn under a beech
wolves howl on a ridge in the moonlight

a grey cat sleeps in a cardboard box
a hamster runs in a plastic wheel
a goldfish swims past a castle in its bowl
a vet listens to the heart of a rabbit
a tortoise eats a slice of cucumber
a poodle is clipped at a grooming table
a canary sings in a round cage
a guinea pig peeks out of a sleeve

a greenhouse full of tomato plants
a gardener prunes roses with a pair of shears
mushrooms grow on a fallen trunk
tulips in a striped field next to a windmill
a bonsai tree in a flat glazed pot
a wheelbarrow full of pumpkins
ivy covers the window of an abandoned house
cherry blossoms fall on a park bench

neon signs are reflected in a wet street
a taxi waits outside a hotel at midnight
fireworks burst over a bridge
a night watchman shines a torch along a corridor
light trails of cars around a monument
a food cart with steamed windows on a dark corner
an empty petrol station under white lamps
a couple looks at a skyline from a rooftop bar

bricklayers work on a scaffold
a crane lifts a steel beam above a half built tower
a road roller flattens fresh asphalt
a plumber lies under a kitchen sink
workers in helmets pour concrete from a hose
a ladder leans against a freshly painted wall
an electrician pulls cables through a ceiling
the shell of a wooden house without windows

robots weld the body of a car
bottles move along a conveyor belt
a worker in a mask grinds metal in a shower of sparks
rolls of paper are stacked in a warehouse
women sort tea leaves at a long table
smoke rises from three brick chimneys
a forklift carries a pallet of crates
molten steel is poured into a mould

a teacher writes an equation on a blackboard
pupils raise their hands in a classroom
an open lunch box on a school desk
a librarian pushes a cart of books between the shelves
students sit an exam in a sports hall
a globe and a ruler next to an inkwell
a yellow school bus stops at a corner
a child learns to write the letter B

a meeting around a table with laptops and a projector
a receptionist answers a telephone behind a counter
sticky notes in many colours on a glass wall
a man in a tie sleeps with his head on a keyboard
cables run into a rack of blinking servers
a cleaner empties waste baskets in an open-plan office
a handshake above a signed contract
a typewriter with a sheet of paper in it

a suit of armour stands in a castle corridor
a mummy lies in a painted coffin
visitors look at a large oil painting of a battle
a stone bust without a nose on a pedestal
a restorer cleans a fresco with a cotton bud
coins with the head of an emperor in a display case
a reed boat carved on the wall of a tomb
a row of stained glass windows throws colours on the floor

a fishmonger weighs a salmon on a scale
spices in open sacks at a bazaar
a shop window with mannequins in winter coats
a customer tries on glasses in front of a mirror
trolleys are lined up in front of a supermarket
a barber shaves a man with a straight razor
a florist ties a bouquet of lilies
second-hand books in boxes on a pavement

a tower of wooden blocks is about to fall
a doll's house with tiny furniture
a chessboard with only a few pieces left
a toy train goes round a Christmas tree
children fly a kite shaped like a dragon
a teddy bear with one missing eye
playing cards and chips on a round table
a rocking horse in an attic full of boxes
""".strip().split("\n")
TEXTS = [text for text in TEXTS if text]
CHECKSUM = value_checksum(TEXTS)  # an index keeps it, to notice that it was compared with other texts
