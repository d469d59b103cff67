"""Words for keys and lists. None of them contains another, so that naming one never counts as naming another.

None stands in the question that asks for common words: who repeats the question names no answer.
"""

import functools
from collections.abc import Sequence

ADJECTIVES = """
abrupt absent active acute adept aerial agile airy alert alien amber ample ancient angular annual antique arctic arid ashen
atomic austere avid aware awkward azure bald balmy bare basic bent big bitter blank bleak blind blond blue blunt bold bony
boreal bossy brackish brave brazen brief bright brisk brittle broad bronze brown bulky bumpy burly busy calm candid careful
casual cautious central certain charming chatty cheap cheerful chief chilly chubby circular civic civil classic clear clumsy
coarse coastal cobalt cold colossal comic compact complex concise concrete convex cool copious coral cordial cosmic costly
cozy cranky creamy crimson crisp crooked crucial crude cubic curious curly current curved cyclic daily dainty damp daring dark
dazzling dear deep deft dense desert devout dewy digital dim docile domestic dormant double downy drowsy dry dual dull durable
dusky dusty dutiful eager early earnest earthy eastern easy elastic elated elder elegant elite eloquent emerald eminent empty
endless entire equal erratic eternal ethical exact exotic expert extinct exuberant fabled faint fair faithful familiar famous
fancy fast feeble fertile fervent festive fierce fiery final fine firm fiscal fluent fluffy fond formal forward fragrant frail
frank fresh friendly frosty frugal full funny furry fuzzy gallant gaudy generous genial gentle genuine giant giddy gifted glad
gleaming glossy golden good graceful grand granular grateful grave greedy green gritty gruff guarded gusty handy happy hardy
harsh hasty hazel hazy heavy hidden hollow honest horrid huge humble humid hungry husky ideal idle immense indigo inner ivory
jagged jaunty jolly jovial joyful juicy junior keen kind knotty lanky large lavish lawful lazy leafy lean legal lenient limber
limp linear liquid literal little lively local lone long loose lovely loyal lucid lucky lunar lush magenta magic major marine
massive mature mean meek mellow merry metallic mighty mild milky minor misty mobile modern modest moist monthly moody muddy
muffled mute narrow native neat needy nervous neutral new nice nimble nocturnal noisy nominal northern novel nutty oaken
obscure odd olive opaque opulent orange ordinary ornate outer oval overt paltry parched partial patient peaceful petite pink
placid plausible playful polar polite pompous poor porous portable prickly prime pristine private prompt proper proud prudent
public puny pure purple quaint quick quiet quirky radiant rancid rapid rare rash ready recent regal remote resolute rich rigid
ripe roasted robust rocky rosy rotund rough round royal ruddy rugged rural rustic rusty sacred saline salty sandy sane satin
savory scarce scarlet scenic secret secure sedate senior serene severe shady shaggy shallow sheer shiny short shrewd shy
silent silken silly silver simple sincere skilled sleek sleepy slender slim slow sly small smart smooth snowy snug sober soft
solar solemn solid sonic sour southern spare sparse spicy spiral splendid spotted square stable stale starry stately steady
steep sticky stiff stoic stormy stout strange strict strong stubborn sturdy subtle sudden sullen sunny superb supple sweet
swift tacit tame tangy tardy tart tasty tawny teal tender tense tepid thick thin thirsty thorny tidal tidy timid tiny tired
topaz tough tranquil tricky tropical true typical ultimate unique upper upright urban urgent useful usual vacant vague valiant
valid vast velvet verbal vibrant violet viral virtual visible vital vivid vocal volatile warm wary watery weak wealthy weary
weekly western wet whimsical white whole wide wild windy wintry wiry wise witty woolly worthy young zany zealous
""".split()

NOUNS = """
acorn agate airport album alcove alley almond anchor angle ankle anthem antler anvil apple apron aquarium arcade archive arena
artist atlas attic auction author autumn avenue award axle badge bagel balcony ballad balloon bamboo banana bandage banjo
banner barge barley barn barrel basil basin basket bassoon battery bay beach beacon beaker beam bean bear beaver bedrock
beetle bell bench bicycle biscuit bishop bison blossom boat bobcat bonfire bonnet bookcase boot bottle boulder bouquet
bracelet bread breeze brick bridge broom brush bucket budget buffalo bugle bundle bunker butter button cabbage cabin cable
cactus cafe cage cake calendar camel camera campus canal candle cannon canoe canvas canyon captain caravan cargo carpet carrot
cart cashew castle catalog cathedral cattle cave cedar ceiling celery cellar cello cement century cereal chain chair chalk
channel chapel chapter charcoal chariot cheese chef cherry chess chestnut chicken chimney chisel chorus cider cinema circus
citadel citrus clarinet clay clerk cliff clinic cloak clock cloud clover coach cobweb cocoa coconut coffee collar colony
column comet compass concert condor copper cork corner corridor cottage cotton couch cougar council counter county courier
cousin coyote cradle crane crater crayon creek cricket crocus crown crystal cucumber cupboard curtain cushion custard cymbal
cypress daisy dancer dentist deputy desk diamond diary diploma dock doctor dolphin donkey door drawer dress drum duck dune
eagle easel echo eclipse editor elbow elephant elevator elm embassy ember emblem emperor engine envelope escort estuary
eyebrow fabric factory falcon farmer feast feather fence fern ferry fiddle field fig filter finch finger fjord flag flame
flannel flask flint flour flower flute foam folder forest fork fossil fountain fox freight fridge frog fruit funnel furnace
gadget galaxy gallery gallop garage garden garlic garment gazebo gazelle gecko geyser ginger giraffe girder glacier glass
globe glove goat goblet goose gorge gorilla grain granite grape grass grocery guest guitar gull gutter hail hallway hamlet
hammer hammock hamster handle hangar harbor harp harvest hawk hay headland hearth hedge heron hinge hippo hockey honey hook
horizon hornet horse hospital hotel hound husband hut hyacinth iceberg icicle igloo iguana insect iris iron island ivy jacket
jaguar jar jasmine jelly jewel jigsaw journal judge jug jungle juniper kennel kernel kettle keyboard kingdom kiosk kitchen
kite kitten knapsack knee knife knight knob koala label laboratory ladder ladle lagoon lake lamb lamp lantern lapel larch lark
lasso laurel lava lavender lawn lawyer ledge legend lemon lemur lentil leopard lettuce lever library lighthouse lilac lily
lime linen lizard llama lobster locket locust lodge loft lotus lunch lynx lyric machine magazine magnet magnolia magpie
mailbox mallet mango mansion mantle maple marble margin market marsh marten mascot mattress mayor meadow medal melody melon
memoir mentor merchant meteor mill mineral minnow mint mirror mitten moat mole monarch monkey monsoon monument moose mosaic
moss moth motor mountain mouse movie muffin mulberry mule museum mushroom musket mussel mustard nebula necklace needle
neighbor nephew nettle nickel noodle notebook nugget nurse nutmeg oasis oboe ocean octopus officer onion opal opera orbit
orchard orchid oregano organ osprey otter outpost oven owl oxygen oyster packet paddle padlock pagoda palace palette palm
panda panel panther pantry papaya paper paprika parade parcel parent park parrot parsley passage pasta pasture patio patrol
pavilion peach peacock peanut pebble pelican pencil pendant penguin peony pepper perfume petal petunia pheasant phoenix phone
physicist piano pickle picnic pier pigeon pilgrim pillow pilot pine pioneer pipe pirate pistachio pizza planet plank plateau
platter plaza plum pocket poem poet polygon pony poppy porcelain porch portrait postcard potato powder prairie prism professor
propeller prune puddle puffin pumpkin puppet puppy purse puzzle pyramid quail quarry quartz quay queen quill quilt quiver
rabbit raccoon radish raft raisin ramp ranch raspberry raven recipe reef relic reptile reservoir rhubarb ribbon rice river
roadway robin rocket roof rooster root rose rudder ruler saddle saffron salad salmon salon sandal sapling sardine sauce
sausage scarf scholar school scissors scooter scorpion scroll sculptor seashell season senator shed shelf shelter sherbet
shield ship shirt shovel shrimp sickle siren skate skillet skirt skunk slate sled sleeve slipper sloth smoke snail snake soap
sock sofa soldier sonata sonnet soup spade spaniel sparrow spatula spear sphere spider spinach spire sponge spoon sprout
squash squid squirrel staircase stallion stamp starfish statue steam stencil stereo steward stirrup stone stool stork stove
strawberry student studio suburb sugar suitcase sultan summer summit surgeon swallow swamp swan sweater sword syrup tablet
tadpole tailor talon tambourine tangerine tapestry tavern teacup teapot telescope temple tennis tent terrace theater thimble
thistle thread throne thunder thyme ticket tiger timber tinsel toad toast tomato tongue torch tornado tortoise toucan towel
tower tractor trail train trapeze treasure tree trellis tribune trolley trombone trophy trousers trout truck trumpet trunk
tulip tundra tunnel turkey turnip turret turtle tweezers umbrella uncle unicorn uniform vacuum valve vase vault vendor veranda
vessel viaduct village violin volcano vulture wafer waffle wagon waist wallet walnut walrus waltz warden wardrobe warehouse
wasp waterfall whale wheat wheel whisker whistle widow willow window winter wizard wolf wombat wreath wren yacht yak yam yard
yogurt zebra zeppelin zipper zither
""".split()

VERBS = """
abandon abolish absorb accept accuse achieve acquire adapt adjust admire admit adopt advise agree amuse announce
apply approve argue arrange arrive assemble assist assume attach attend attract avoid bake balance bargain bathe become begin
behave believe besiege bestow betray blame blend bless blink bloom boast boil borrow bother bounce breathe bring browse build
burrow bury calculate cancel capture caress carve catch cease challenge change chase cherish chew choose chop clap clarify
climb cling clutch collapse collect combine comfort command compare compete complain compose conceal confess confuse connect
conquer consider consist construct consume contain continue contribute convince cook correct cough crawl create criticize
crush cultivate decay deceive decide declare decline decorate dedicate defend delay deliver demand deny depart depend describe
deserve design destroy detect determine develop differ discover discuss dismiss dissolve distribute dive divide donate doubt
drag dream drift drown elect embark embrace emerge employ enable enclose encourage endure enforce enhance enjoy enroll ensure
enter escape establish estimate evaluate evolve examine exceed excite exclude excuse exist expand expect explain explode
explore expose express extend fade fail feed fetch fill find finish flatter flee float follow forbid forecast forget forsake
foster freeze frown fulfil furnish gamble gather giggle give glance glide gossip grab greet grieve grind groan grow guess
guide happen hasten hatch haul help hesitate hide hire hope hover hunt hurry identify ignore illustrate imagine imitate
immerse impress improve include increase indicate infer inform inherit inquire insert insist inspect install instruct insult
interrupt introduce invade invent invest invite irritate join justify kick knit knock know laugh launch lead leap learn linger
listen loathe lurk maintain manufacture marvel measure meditate melt mend mention migrate mingle modify motivate
mourn multiply mumble murmur nag narrate navigate neglect negotiate nibble nod notice nourish nudge obey oblige observe obtain
occupy occur offend offer omit oppose overcome participate pause perceive perform permit persist persuade plunge polish ponder
possess postpone pour practice praise pray predict prepare prescribe preserve pretend prevail prevent proceed proclaim produce
prohibit promise promote pronounce propose protect provide publish pull punish pursue qualify quarrel quench quote realize
rebel recall receive reckon recognize recover recruit reduce refer reflect refuse regret rehearse reject rejoice relate relax
release rely remain remark remind remove render repair repeat replace reply rescue resemble resent reside resign resist
resolve respect respond restore retain retire retreat retrieve return reveal revise revive reward rinse roam rotate rub ruin
sail salute satisfy scatter scrape scratch scream search seek seize sell send separate settle shatter shiver shout shrink
shrug shudder sigh simplify sing sink skip slice slide smile sneeze sniff snore soak soothe speak speculate spend spill spoil
sprinkle squeeze stagger stare starve stitch stretch strive stroll struggle submit subtract succeed suffer suggest supervise
supply support suppose survive suspect sustain swear swim swing sympathize tackle talk teach tease tell tempt thank throw
tickle tolerate transform travel tremble trust tumble twist understand undo unfold unite unlock unpack vanish vary venture
verify visit volunteer vote wait wake wander want warn waste watch weave weep whine whisper wipe wish withdraw withstand
witness wonder worry wrap wrestle write yawn yearn yell yield zoom
""".split()


@functools.lru_cache(maxsize=1)
def singles() -> list[str]:
    """All of them, sorted."""
    return sorted(ADJECTIVES + NOUNS + VERBS)


@functools.lru_cache(maxsize=2)
def pairs(adjectives: Sequence[str] = ADJECTIVES, nouns: Sequence[str] = NOUNS) -> list[str]:
    """`adjective-noun` of each adjective and noun, sorted."""
    return sorted({f"{adjective}-{noun}" for adjective in adjectives for noun in nouns})
